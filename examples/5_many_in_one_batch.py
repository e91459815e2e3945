"""All clients answer the same question in one batch: `python examples/5_many_in_one_batch.py MIXTURE RUN`."""

import sys
from pathlib import Path

from pomona.artifacts.personal import PersonalModel, clients_of_run
from pomona.serving.answering import Answering
from pomona.serving.asked import Asked, prompt_tokens
from pomona.serving.models import load_served

mixture, run = sys.argv[1], Path(sys.argv[2])
served, tokenizer = load_served(clients_of_run(run, PersonalModel(mixture)))
with Answering(served, tokenizer) as answering:
    answers = {}
    for name, own in served.items():
        turns = [("user", "What of the plum in spring?")]
        prompt = prompt_tokens(turns, own.template, tokenizer, own.context - 24)
        answers[name] = answering.ask(name, Asked(prompt, new_tokens=24))
    for name, answer in answers.items():
        print(f"{name}: {''.join(answer).strip()}")
