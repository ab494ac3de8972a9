"""The figures of speed and memory, measured on the machine at hand.

rows.py says what is measured, rows_of_outputs.py what of a head beside its loss, and measuring.py how. The peers live
in peers/, each library in processes of its own (worker.py, called by workers.py). results.py keeps the figures;
tables.py, bars.py, pages.py and pictures.py show them. One row, quickly, of one library:
`python -m tools.bench run --only dpo --library tensorflow --quick --output runs/one.json`.
"""
