"""The measured functions: a module for each library.

Each has `peer(name, case, folder)`, which returns a function that makes one call and returns its results, by name, when
they are there; `arrays(results)`, the same as NumPy arrays; `versions()`; and `forget()`. A peer that cannot do what is
asked raises an error, whose sentence then stands below the table.
"""
