"""What a report shows, a file per subject; each section is HTML, or "" where nothing was measured."""
