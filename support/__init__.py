"""The plumbing under the method: nobody needs to read it before wanting to change it.

    flags.py        command-line flags, what is refused, and the one line that says why
    training_flags.py   those of the training scripts
    checks.py       what these assert and say before their first step
    device.py       where to compute, in what precision, memory settings
    processes.py    several processes, one for each accelerator
    sharding.py     --fsdp: each of them keeps a part of every weight
    head.py         the log-probs of tokens, fast
    static.py       generation in shapes that never change, for torch_xla
    sampling.py     drawing a token, from all or from the likely ones
    passes.py       a model over a whole data set: scores, samples
    prompts.py      what a policy is to answer
    cache.py        what is constant is computed once and kept on disk
    run.py          a run's folder: flags, metrics, state, resuming, the line on the screen
    checkpoint.py   weights in Hugging Face's GPT-2 layout, in and out
    other_kinds.py  weights in other layouts: read, or named as what they are
    tokenizer.py    tiktoken encodings and models' own tokenizers, in; tokenizer.json, out
    formats.py      rows of text from files and from the hub, in every layout
    tokens.py       rows of text as flat arrays of token ids, kept on disk
    report.py       tables and the evaluation report
    figures.py      its figures
    files.py        files and folders that are whole or not there

It knows nothing of the files in the root: models, functions and arrays come as arguments.
"""
