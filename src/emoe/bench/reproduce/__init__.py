"""`emoe reproduce`: every measurement of the paper (arXiv 2503.06823), on any supported model.

experiment   what one experiment is, and where they are found by name
workbench    what all share: the model, prompts, recorded routes, profile, and the cells of a run that goes on
findings     what comes out: claims with a verdict, tables, pictures
judging      how good answers stay: what is fed, how the engine runs, kept in cells that experiments share
accuracy     the numbers of it, and verdicts
rivals       what chooses experts only to be compared with
drawing      one look for all pictures
page         one HTML page of all findings
running      a run of several experiments
experiments  one file for each figure or table: configuration and a picture
"""
