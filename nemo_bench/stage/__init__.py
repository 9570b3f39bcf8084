"""The stage folder: what a job on a cluster finds there besides its dataset.

    <stage>/<entrypoint.image>            the container image as a squash file
    <stage>/llama3.1-dataset/llama/       the tokenizer, as Hugging Face lays it out
    <stage>/nemo_bench/                   this project's code, and vendor/ with the pure-Python packages it needs
    <stage>/stage.json                    sizes, SHA-256, versions and dates of all that

`PYTHONPATH=<stage>/nemo_bench:<stage>/nemo_bench/vendor` is what uses the code.
"""
