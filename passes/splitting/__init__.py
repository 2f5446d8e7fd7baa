"""Helpers of the passes that split a batch into microbatches, and the stages of pipelines."""
