"""From a module and a call to a program: tracing, arguments, results, values for models on `meta`."""
