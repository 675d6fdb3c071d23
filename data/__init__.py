"""Where tasks and expert trajectories come from: tables, questions about them, teachers."""
