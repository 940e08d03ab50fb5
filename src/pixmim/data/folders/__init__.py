"""Picture files on this machine: below a folder, or named; found quickly a second time."""
