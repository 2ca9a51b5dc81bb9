"""The wording of each task: a family of phrasings, eight for training and three that training never sees."""

from __future__ import annotations

TASKS = ("summarise", "classify", "qa", "ask", "compare", "converse", "code", "maths")

TRAIN: dict[str, tuple[str, ...]] = {
    "summarise": (
        "Summarise this text in one sentence.\n\n{text}",
        "Write a one-sentence summary of this abstract.\n\n{text}",
        "Give a short summary.\n\n{text}",
        "{text}\n\nSummarise the text above.",
        "What is the main point of this paper? Summarise it briefly.\n\n{text}",
        "{text}\n\nTL;DR in one sentence, please: summarise.",
        "Please summarise the following passage.\n\n{text}",
        "Condense this abstract into a brief summary.\n\n{text}",
    ),
    "classify": (
        "Classify the feeling of this message as {labels}.\n\n{text}",
        "Which label fits this tweet: {labels}?\n\n{text}",
        "{text}\n\nClassify the message above. Labels: {labels}.",
        "What is the sentiment of this post? Choose from {labels}.\n\n{text}",
        "Label the emotion of the text with one of {labels}.\n\nText: {text}",
        "Sentiment classification. Labels: {labels}.\n\nMessage: {text}",
        "Read the tweet and pick its label from {labels}.\n\nTweet: {text}",
        "How does the writer of this message feel? Classify it as {labels}.\n\n{text}",
    ),
    "qa": (
        "Answer the question from the passage.\n\nPassage: {text}\n\nQuestion: {question}",
        "Read the passage and answer the question.\n\n{text}\n\nQuestion: {question}",
        "{text}\n\nUsing the passage above, answer: {question}",
        "Passage: {text}\n\nAnswer with words from the passage: {question}",
        "Question: {question}\n\nFind the answer in this passage.\n\n{text}",
        "According to the passage, {question}\n\nPassage: {text}",
        "Context: {text}\n\nAnswer this question about the context: {question}",
        "Give the short answer to the question, copied from the text.\n\nText: {text}\n\nQuestion: {question}",
    ),
    "ask": (
        "Write a question that this sentence answers.\n\n{text}",
        "Ask a question about this sentence.\n\n{text}",
        "{text}\n\nWrite one question about the sentence above.",
        "Turn this fact into a quiz question.\n\n{text}",
        "What question could a teacher ask about this sentence?\n\n{text}",
        "Make up a reading question for the following sentence.\n\n{text}",
        "Compose a question whose answer is in this sentence.\n\nSentence: {text}",
        "Generate a question from the sentence.\n\nSentence: {text}",
    ),
    "compare": (
        "Compare the two sentences. How similar are they, from 0 to 5?\n\nA: {a}\nB: {b}",
        "Rate how similar in meaning these sentences are, from 0 to 5.\n\n1. {a}\n2. {b}",
        "Compare the meaning of A and B and give a similarity score between 0 and 5.\n\nA: {a}\nB: {b}",
        "Sentence one: {a}\nSentence two: {b}\n\nScore their similarity from 0 to 5.",
        "Do these two sentences mean the same? Compare them and score from 0 to 5.\n\nFirst: {a}\nSecond: {b}",
        "Similarity of two sentences, 0 (different) to 5 (same):\n\n{a}\n{b}",
        "A: {a}\nB: {b}\n\nCompare A with B: similarity score from 0 to 5?",
        "How close in meaning are the following two sentences? Score from 0 to 5.\n\n- {a}\n- {b}",
    ),
    "converse": (
        "{text}",
        "Let's talk. {text}",
        "Play along in this conversation. {text}",
        "{text}\n\nReply in character.",
        "Role-play: {text}",
        "Here is the situation for our chat. {text}",
        "Have a conversation with me. {text}",
        "Respond as in a real conversation.\n\n{text}",
    ),
    "code": (
        "Write code for this task.\n\n{text}",
        "{text}\n\nAnswer with code.",
        "Programming task: {text}",
        "Write a program. {text}",
        "Solve this programming problem.\n\n{text}",
        "Please code the following.\n\n{text}",
        "As a programmer, implement this: {text}",
        "Show me the code.\n\n{text}",
    ),
    "maths": (
        "Solve this maths problem step by step.\n\n{text}",
        "Work out the answer.\n\n{text}",
        "{text}\n\nCalculate the answer, showing the steps.",
        "Maths problem: {text}",
        "Calculate step by step.\n\n{text}",
        "Solve the word problem.\n\n{text}",
        "{text}\n\nShow your calculation and give the number.",
        "Here is an arithmetic problem. Solve it.\n\n{text}",
    ),
}

HELD_OUT: dict[str, tuple[str, ...]] = {
    "summarise": (
        "In a single sentence, summarise what follows.\n\n{text}",
        "{text}\n\nNow write the summary of this abstract.",
        "I need a quick summary of this paper.\n\n{text}",
    ),
    "classify": (
        "Is the sentiment of this tweet {labels}?\n\n{text}",
        "Message: {text}\n\nChoose its label: {labels}.",
        "Classify this post. The labels are {labels}.\n\n{text}",
    ),
    "qa": (
        "Use this passage to answer a question.\n\n{text}\n\n{question}",
        "Question about the passage below: {question}\n\nPassage: {text}",
        'Text: {text}\n\nWhat is the answer to the question "{question}"?',
    ),
    "ask": (
        "Think of a question to ask about this: {text}",
        "Sentence: {text}\n\nNow ask a question about it.",
        "Which question does the following sentence answer?\n\n{text}",
    ),
    "compare": (
        "Give a score from 0 to 5 for how similar these are.\n\nA: {a}\nB: {b}",
        "First sentence: {a}\nSecond sentence: {b}\n\nCompare them, 0 to 5.",
        "On a scale from 0 to 5, compare these sentences in meaning.\n\n{a}\n{b}",
    ),
    "converse": (
        "I would like to chat. {text}",
        "{text}\n\nWhat do you say in this conversation?",
        "Stay in character while we talk. {text}",
    ),
    "code": (
        "Implement the following in code.\n\n{text}",
        "{text}\n\nWrite the program for it.",
        "Here is a coding task for you: {text}",
    ),
    "maths": (
        "Find the answer to this maths problem, step by step.\n\n{text}",
        "{text}\n\nSolve it and show each calculation.",
        "Problem to calculate: {text}",
    ),
}


def render(task: str, fields: dict[str, str], phrasing: int, held_out: bool = False) -> str:
    family = (HELD_OUT if held_out else TRAIN)[task]
    return family[phrasing % len(family)].format(**fields)
