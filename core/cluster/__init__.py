"""Several instances behind a router: what it is shown, and how its answers are carried out."""
