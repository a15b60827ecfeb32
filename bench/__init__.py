"""The benchmark of fastconv: ``fastconv bench``, and ``pytest bench/`` over the same rows.

==============  ======================================================================================================
``layers``      what is measured: the named layers, and the slices of them that naive is timed on
``engines``     who is measured: every row of the registry that can compute an operation of a layer
``peers``       who else: other libraries, each optional
``training``    whole training steps of two networks, for ``--train``
``choice``      the choice of an algorithm against the best, on random layers, and the times it is made from
``tile``        against what: the bare register tile, and multiply-adds in registers
``timing``      how: in turns, threads pinned
``report``      the table and the JSON
``cli``         the command
``test_bench``  the pytest-benchmark suite
==============  ======================================================================================================

To add a layer: one line in ``layers.LAYERS``; a network: one line in ``training.NETWORKS``. To add a peer: one class in
``peers`` and one line in ``peers.PEERS``. To add a column: one line in ``report.COLUMNS``. An algorithm of the registry
is measured without touching anything here.
"""
