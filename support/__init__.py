"""Plumbing. Skip it on a first read.

    flags.py            reads command-line flags; says in one line what is wrong with them
    training_flags.py   the flags of the two training scripts
    device.py           where to compute, in what precision; several processes, --fsdp
    logprobs.py         the log-probs of tokens, fast
    rms_norm.py         RMSNorm and its gradient, fast
    columns.py          scores and sampled responses of a whole data set, kept on disk and checked
    prompts.py          the prompts that a policy answers; prints its replies as they grow
    run.py              a run's folder: flags, metrics, state, resuming, the line on the screen
    files.py            files and folders that are written whole or not at all; JSON
    checkpoint.py       reads and writes weights in Hugging Face's layout
    families.py         how the families differ in that: config.json, names of weights
    tokenizer.py        reads tiktoken's and models' own tokenizers, writes tokenizer.json
    sources.py          finds and reads records: in a file, a folder, a data set on the hub
    rows.py             turns records of every layout into rows: a prompt and its responses
    chat.py             turns chat messages into text by a model's own template
    tokens.py           turns rows into arrays of token ids, kept on disk
    report.py           the evaluation report: tables and figures

It knows nothing of the files in the root: models, functions and arrays come as arguments.
"""
