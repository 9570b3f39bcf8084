"""Starting runs: what one local process group is, and the record it leaves."""
