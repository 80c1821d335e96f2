"""Training and evaluation of the built-in reader: a tiny model of DeepSeek-OCR's architecture, made from drawn pages.

Used by tools/train_reader.py only; not part of the installed package. What each file holds:
words.py (what is written), fonts.py (with which letters), pages.py (drawing), data.py (tokenizer, batches),
towers.py decoder.py model.py (the network, as it is trained), losses.py, optim.py, recipe.py (schedules), loop.py
(the training processes), evaluate.py (reading through the engine, character error rate).
"""
