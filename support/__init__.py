"""Plumbing. Skip it on a first read.

    flags.py            reads command-line flags; says in one line what is wrong with them
    training_flags.py   the flags of the two training scripts
    device.py           where to compute, in what precision; several processes, --fsdp
    backward.py         two backward passes by hand: log-probs of tokens, and RMSNorm
    columns.py          scores and sampled responses of a whole data set, kept on disk and checked
    run.py              a run's folder: flags, metrics, state, resuming, the line on the screen
    checkpoint.py       reads and writes weights in Hugging Face's layout, adapters in PEFT's
    families.py         how each family lays out its files: config.json, names of weights
    tokenizer.py        reads tokenizers and chat templates, writes tokenizer.json
    sources.py          finds and reads records: in a file, a folder, a data set on the hub
    rows.py             turns records of every layout into rows, and rows into segments of text
    tokens.py           turns rows into arrays of token ids, kept on disk; picks rows and prompts
    report.py           the evaluation report: tables, figures, a page for the browser

Nothing here imports a file of the root: models, functions and arrays come as arguments.
"""
