"""From a module and a call to a program: tracing, guards, refusals, arguments, results, values for models on `meta`."""
