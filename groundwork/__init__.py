"""What everything else stands on: modules that know nothing of captioning or of each other's users.

They import nothing of the project but each other.
"""
