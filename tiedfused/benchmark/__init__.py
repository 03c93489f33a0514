"""What `tiedfused bench`, `tiedfused profile` and `tiedfused tune` run.

    shapes.py    which problems
    peers.py     what the layer is compared with, and the operands
    device.py    what the device is, its clocks, how a call on it is timed
    measure.py   one cell of the table: correctness, times, memory
    bench.py     all cells, written as they come
    report.py    the results file: schema, tables, comparison with an earlier file
    plots.py     pictures of a results file
    profile.py   one problem kernel by kernel
    tune.py      the search for tiles
    console.py   tables and progress, with rich or without

Importing the layer imports nothing of this package. rich and matplotlib are used where they are installed; without
them tables are plain text and pictures are left out, which a line says.
"""
