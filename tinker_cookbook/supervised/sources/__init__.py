"""Where rows come from: files of each container, folders, globs, and weighted mixes of them."""
