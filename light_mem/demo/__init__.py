"""`light-mem demo`: a small transformer whose KV cache outlives its process.

The prompt is `text.txt`: the Declaration of Independence (1776) in full without the signatures,
then the Preamble and Article I of the Constitution of the United States (1787), in the spelling
of the parchments. Both are in the public domain everywhere that their age or their nature as
acts of government counts, which includes the United States. The text was taken from Debian's
package miscfiles 1.5 and corrected, word by word, after the transcription of the National
Archives (archives.gov/founding-docs), itself a work of the US government and in the public domain.

    model.py    the transformer, and what bit-for-bit repeatability asks of its caller
    pages.py    K and V as numbers in the rows of the page tensor; the block table
    prefix.py   a name for every full page, made from all the tokens up to its end
    request.py  one request as a server runs it: match, load, compute the rest, decode, store
    proof.py    logits as raw bytes with a digest, and their comparison
    restart.py  the second process: opens the store, continues, recomputes, compares
    run.py      the whole demo, in the first process
    report.py   the table and the verdict
"""
