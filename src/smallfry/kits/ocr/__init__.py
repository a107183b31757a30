"""Reading words in images: CRNN with CTC, generated words, and folders of one's own.

Shi, Bai, Yao, "An End-to-End Trainable Neural Network for Image-based Sequence Recognition and Its
Application to Scene Text Recognition", TPAMI 2017.
"""
