"""Texts written for this project, for the tasks whose data may not be shipped (tweets, STS-B sentences)."""

from __future__ import annotations

EMOTION = "anger, joy, optimism or sadness"
SENTIMENT = "negative, neutral or positive"

CLASSIFY: tuple[tuple[str, str, str], ...] = (
    (
        "My train is late again and nobody tells us why. I am so angry and tired of this terrible service!",
        EMOTION,
        "anger",
    ),
    ("Best birthday ever! Dancing and laughing with all my friends tonight #happy", EMOTION, "joy"),
    ("I miss my grandmother so much. The house is so quiet and empty without her. #sad", EMOTION, "sadness"),
    (
        "Don't worry about one bad day. Keep going, tomorrow is a new start and you will get there.",
        EMOTION,
        "optimism",
    ),
    ("The new album is out on Friday and I can't wait, their last one was amazing!", SENTIMENT, "positive"),
    ("The council meets on Tuesday at 7 pm to discuss the parking plan.", SENTIMENT, "neutral"),
    ("Worst customer support I have ever had. I may never buy from this shop again.", SENTIMENT, "negative"),
    ("Happy Sunday! Thank you all for the great game yesterday.", SENTIMENT, "positive"),
)

COMPARE: tuple[tuple[str, str, str], ...] = (
    ("A woman is slicing a tomato.", "A woman is cutting a tomato.", "4.8"),
    ("Two boys are kicking a ball in the park.", "Two boys play football in a park.", "4.2"),
    ("A man is riding a bicycle down the street.", "A man is riding a motorcycle down the street.", "2.5"),
    ("A cat is sleeping on the sofa.", "The company reported higher profits this quarter.", "0.0"),
    ("The dog runs through the snow.", "A dog is running in the snow.", "4.8"),
    ("A girl is playing the piano.", "A girl is playing the violin.", "2.0"),
    (
        "The minister said the talks would begin on Monday.",
        "Talks will start on Monday, the minister said.",
        "4.8",
    ),
    ("A chef is cooking soup in a large pot.", "A person is washing a car.", "0.2"),
)
