from rich.console import Console

from groupwise.rollout.view import trajectory_panel


def test_a_panel_shows_who_wrote_what_and_how_it_ended() -> None:
    record = {
        "task": {"task_type": "counting", "question": "How many [rows]?", "answer": "7"},
        "status": "answered",
        "answer": "8",
        "correct": False,
        "spans": [{"writer": "prompt", "text": "P [x]"}, {"writer": "model", "text": "<answer>8</answer>"}],
    }
    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(trajectory_panel(record))
    shown = console.export_text()
    for part in ("How many [rows]?", "P [x]", "<answer>8</answer>", "wrong: answered '8', known '7' (answered)"):
        assert part in shown
