"""Starting rank processes, and hearing at once of their exits and stops."""
