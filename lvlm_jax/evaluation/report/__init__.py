"""Reports: everything that was scored, as one page and as Markdown."""
