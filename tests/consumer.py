"""What a user's own script may look like; mypy reads it against the installed package (see test_static.py)."""

import avss_nb as av


def smaller(name: str, texts: list[str], fraction: float = 0.25) -> float:
    "Perplexity of a model without its least important layers, by AVSS."
    model, tokenizer = av.load_model(name)
    scores = av.layer_scores(model, tokenizer, texts, methods=["avss", "block_influence"])
    layers: list[int] = av.select_layers(scores["avss"], fraction=fraction)
    small = av.prune_layers(model, layers)
    healed = av.heal(small, tokenizer, texts, teacher=model, steps=10)
    with av.skip_layers(model, layers[:1]):
        one_less: float = av.perplexity(model, tokenizer, texts)
    return av.perplexity(healed, tokenizer, texts) - one_less


def labels(name: str) -> list[str]:
    "Right or wrong, for a few questions."
    model, tokenizer = av.load_model(name)
    answers = av.generate_answers(model, tokenizer, av.load_questions("atlas", n=5))
    return list(av.label_answers(answers, rule="alias")["alias"])
