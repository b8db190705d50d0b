"""A built-in data set: pictures of simple shapes with the data of every task.

    python -m dataset.shapes --output data/shapes

A scene has 1 to 5 objects. Its *combination* is the multiset of the (color, shape) of its objects.
A checksum of the combination alone decides the split of the scene. So no combination of val or test
is in train, for any seeds and numbers of scenes. scenes_{train,val,test}.json describe the scenes
in full. The other files have the released annotation formats. Each task has a module:

- captions: pre-training and retrieval. Some captions of pretrain.json are wrong.
- vqa: questions on existence, number, color, shape and size, and comparisons. Some of the ten
  annotators disagree.
- ve: each picture has a curtain over a quadrant (images/*_covered/). A hypothesis about a hidden
  object is neutral. Each hypothesis comes once with each label, so the text alone says nothing
  about the label.
- nlvr: each statement is true of one pair of images and false of another pair in the same split. So
  the text alone says nothing about the label.
- grounding, in the form of RefCOCO+: expressions that fit one object of at least two and name no
  place. testA refers to circles, hearts and moons, and testB to the other shapes. Both use the test
  images. refs(unc).p is REFER's file. dets.json has detected boxes.
- attributes, in the form of OVAD: sheets of four pictures of one object each, with a box around
  each picture. The attributes are color, background, size, pattern and position.
- relevance: queries and ads. An ad is a picture and a title. Half of the relevant ads show the
  object of the query, and the others name it. A model that reads only pictures or only titles
  reaches a ROC AUC of 75%.
"""
