"""A built-in data set: pictures of simple shapes with the data of every task.

    python -m dataset.shapes --output data/shapes

A scene holds 1 to 5 objects. Its *combination* is the multiset of the (color, shape) of its
objects. A checksum of the combination alone decides its split. So no combination of val or test is
in train, for any seeds and counts. scenes_{train,val,test}.json describe the scenes in full; the
other files have the released annotation formats, a module each:

- captions: pre-training and retrieval; the captions of pretrain.json are partly wrong
- vqa: questions on existence, number, color, shape and size, and comparisons; some of the ten
  annotators disagree
- ve: half of the pictures have a curtain over a quadrant (images/*_covered/). A hypothesis about
  something out of sight is neutral there. The text alone says nothing about the label. The text and
  the presence of a curtain give 67% accuracy
- nlvr: each statement is once true and once false of two images of a split, so that the text alone
  says nothing
- grounding in the form of RefCOCO+: expressions that fit one object of at least two and name no
  place. testA refers to circles, hearts and moons, testB to the other shapes, both in the test
  images. refs(unc).p is REFER's file, dets.json has detected boxes
- attributes in the form of OVAD: sheets of four pictures of one object each, a box around each
  picture; color, background, size, pattern, position
- relevance: queries and ads of a picture and a title. Half of the relevant ads show the object of
  the query, the others name it. Pictures alone, or titles alone, give a ROC AUC of 75%
"""
