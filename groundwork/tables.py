"""Tables for people, in Markdown."""


def print_table(rows):
    """Prints dicts of column -> text as a Markdown table, its columns aligned."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(t.rjust(w) for t, w in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    rule = "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
    print("\n".join([lines[0], rule, *lines[1:]]))


def print_tables(head, tables, notes):
    """Prints a line, tables with their titles, and further lines."""
    print(head)
    for title, rows in tables:
        print(f"\n{title}")
        print_table(rows)
    for note in notes:
        print(note)
