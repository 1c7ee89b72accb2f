"""Other evaluators' result files, read into the tidy tables of `vlm4vla_core.results`.

One module per evaluator: `recognises(content)` looks at what a file holds, never at its name, and
`read(content, labels)` turns it into rows. Trap: a pickle is never opened, whoever wrote it.
"""
