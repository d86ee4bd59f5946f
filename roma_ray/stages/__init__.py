"""The stages on Ray: the same work as in one process, spread over a cluster, to the same bits."""
