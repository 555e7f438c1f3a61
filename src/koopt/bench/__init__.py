"""``koopt bench``: time to target against everything else people do."""
