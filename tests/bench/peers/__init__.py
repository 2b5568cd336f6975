"""Other servers beside this project's, on the same graphs and under the same load. `make bench-peers` enters it.

A folder for each peer holds its settings, its server code and its `requirements.txt`; `table.py` lists the peers. Files in
these folders and `graph.py` run in the peers' own environments, so they import nothing of this project.
"""
