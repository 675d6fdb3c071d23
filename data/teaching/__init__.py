"""How it is answered: scripts of programs and of models, played with real executions."""
