"""The same work on Ray, spread over a cluster, to the same bits."""
