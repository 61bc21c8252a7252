"""Where rows come from (files, folders, the hub) and what each kind of row says."""
