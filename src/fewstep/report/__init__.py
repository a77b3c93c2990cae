"""Pages and pictures a person looks at."""
