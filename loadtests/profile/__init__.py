"""Where the time of single requests goes, from the client to the operators of the graph and back.

`python -m loadtests.profile` (`make profile`) is the command. `record` sends the requests beside the server, `sources`
reads what the server and its backend left, `timeline` draws it for Perfetto, `tables` sums it up.
"""
