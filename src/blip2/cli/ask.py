"""`blip2 ask IMAGE ... QUESTION`."""

from __future__ import annotations

import argparse
import json

from blip2.cli.options import Commands, add_beams, add_frames, add_json, add_model, add_shots


def add_parser(commands: Commands) -> None:
    """`blip2 ask`."""
    ask = commands.add_parser("ask", help="ask a question about an image, several images together, or a film")
    ask.add_argument("image", nargs="+", help="image, film (.mp4, .webm, .gif) or folder of frames; several in order")
    ask.add_argument("question")
    add_json(ask)
    add_frames(ask)
    add_beams(ask)
    add_shots(ask)
    add_model(ask)
    ask.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answer one question about one image, or about several together."""
    from blip2.data.few_shot import read_shots
    from blip2.data.film import FRAMES, open_sample
    from blip2.inference.loading import load_model

    names = options.image[0] if len(options.image) == 1 else options.image
    open_sample(names, options.frames or FRAMES)  # what cannot be read is said before a model is loaded
    shots = read_shots(options.shots) if options.shots else []
    model, _ = load_model(options)
    model.frames = options.frames or model.frames
    answer = model.answer(names, options.question, beams=options.beams, shots=shots)
    if options.json:
        print(json.dumps({"image": names, "question": options.question, "answer": answer}))
    else:
        print(answer)
    return 0
