"""`light-mem demo`: a small transformer whose KV cache outlives its process.

The prompt is `text.txt`: the Declaration of Independence (1776) without its signatures, then the
Preamble and Article I of the Constitution of the United States (1787), in the spelling of the
parchments. Both are in the public domain: by their age, and as acts of government (17 U.S.C. 105).
The words come from Debian's miscfiles 1.5, without that package's headings and notes; they were
corrected word by word against two public copies of the National Archives' transcription
(archives.gov/founding-docs): miscfiles lacks a sentence and modernises some spellings.

    model.py    the transformer, and what bit-for-bit repeatability asks of its caller
    pages.py    K and V as numbers in the rows of the page tensor; the block table
    prefix.py   a name for every full page, made from all the tokens up to its end
    plan.py     what both processes agree on; the prompt; the model with its page tensor
    request.py  one request as a server runs it: match, load, compute the rest, decode, store
    proof.py    logits as raw bytes with a digest, and their comparison
    restart.py  the second process: opens the store, continues, recomputes, compares
    run.py      the whole demo, in the first process
    report.py   the table and the verdict
"""
