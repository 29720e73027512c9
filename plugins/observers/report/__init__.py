"""Report: what a run measured, as text and as files."""
