"""What everything else stands on: files and errors, options, devices, tables, several processes.

These modules import nothing of the project but each other.
"""

__version__ = "0.2.0"  # of the project
