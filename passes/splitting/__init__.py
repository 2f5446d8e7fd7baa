"""One batch as several microbatches: what the passes share that divide a step so, and stages of pipelines."""
