"""`blip2 ask IMAGE QUESTION`."""

from __future__ import annotations

import argparse
import json

from blip2.cli.options import Commands, add_beams, add_json, add_model, add_shots


def add_parser(commands: Commands) -> None:
    """`blip2 ask`."""
    ask = commands.add_parser("ask", help="ask a question about an image")
    ask.add_argument("image")
    ask.add_argument("question")
    add_json(ask)
    add_beams(ask)
    add_shots(ask)
    add_model(ask)
    ask.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answer one question about one image."""
    from blip2.data.few_shot import read_shots
    from blip2.data.images import open_image
    from blip2.inference.loading import load_model

    image = open_image(options.image)
    shots = read_shots(options.shots) if options.shots else []
    model, _ = load_model(options)
    answer = model.ask([image], [options.question], beams=options.beams, shots=shots)[0]
    if options.json:
        print(json.dumps({"image": options.image, "question": options.question, "answer": answer}))
    else:
        print(answer)
    return 0
