"""The command line's verbs, a module for each family; `__main__` puts them together.

Every module has `add`, which declares its verbs, and imports what they need only when one runs: help must not wait for
torch. Options have the names and defaults of the functions they are passed to, which a test compares.
"""
