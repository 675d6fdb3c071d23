"""One policy talking to one environment: sampler, sandbox, grammars, the many-turn loop."""
