"""Pages to look at, one file each, which needs no network; and figures for a paper."""
