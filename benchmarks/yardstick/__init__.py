"""The model and the rivals of the pipeline benchmark: one plain process, and torch's own pipelines over Gloo."""
