"""What people ask a chat model besides: advice, travel, cooking, feelings, business, follow-ups. Our own words.

A template is a text with slots: ``{dish}`` is drawn from WORDS_TEXT["dish"], ``{dish2}`` is another draw of the same
list. Entries may have slots of their own. A conversation has its turns between lines of ---, the user's and the
assistant's by turns; it ends with the user's.
"""

from __future__ import annotations

import random
import re

from models.training.everyday_words import WORDS_TEXT

KINDS_TEXT = {
    "advice": """How can I {goal}?|I want to {goal}. Where do I start?|{trouble}. What should I do?|What would you
tell someone who wants to {goal}?|I have tried to {goal}, but it never works. Any ideas?|Give me {n} tips to
{goal}.|Is it a good idea to {goal} and to start {hobby} at the same time?|Make a weekly plan for me. I want to
{goal}.|What mistakes do people make when they try to {goal}?|My friend says: "{trouble}." How can I help?|Help me
decide: should I take up {hobby} or {hobby2}?|How do I talk to {person} about a problem? {trouble}.|What is a good
gift for {person}? I can spend {budget}.|What are the first steps if I want to become a {job}?|How do I stay
motivated to {goal}?|What habits help people to {goal}?|{person} wants to {goal}. How can I support that?|I am a
{job} and I want to {goal}. What is realistic?|What should I say to {person} who feels {feeling}?""",
    "feelings": """I feel {feeling} today.|I am {feeling} because {trouble_i}. What can I do?|Why do people feel
{feeling}?|What helps when one feels {feeling}?|I feel {feeling} and {feeling2} at the same time. Is that normal?|
Cheer me up, please.|Write a few kind words for someone who feels {feeling}.|How do I explain to {person} that I
feel {feeling}?|I had a bad day. {trouble}.|I have good news: I managed to {goal}!|What is the difference between
being {feeling} and being {feeling2}?|How can I calm down before {event}?|Say something encouraging about my plan
to {goal}.|I miss {person}.|How do you deal with being {feeling}?|{person} is {feeling} because of {event}. What
can I do?""",
    "travel": """Plan {days} days in {place}.|What are the best things to do in {place} in {season}?|Is {place} a
good destination for a family with small children?|What should I know before I travel to {place}?|Suggest a day
trip near {place}.|What food should I try in {place}?|How do I get around in {place} without a car?|{place} or
{place2} in {season}: where should I go?|I have {budget} for a weekend. Where can I go?|Write a postcard from
{place}.|When is the best time of the year to visit {place}?|What souvenirs can I bring from {place}?|Name {n}
sights in {place} and say a sentence about each.|What do tourists often do wrong in {place}?|Make a schedule for
one rainy day in {place}.|I like {hobby} and good food. What can I do in {place}?|How much money does one need for
{days} days in {place}?|Describe {place} to somebody who has never been there.|Recommend a quiet place for a
holiday in {season}.""",
    "cooking": """How do I make {dish}?|Give me a simple recipe for {dish}.|What can I cook with {food}, {food2}
and {food3}?|What can I use instead of {food} in a recipe?|How long does {food} keep in the fridge?|Suggest a
dinner for {diet}.|What goes well with {food}?|Plan the meals of a week for {diet}.|My {dish_bare} did not turn out
well. What could have gone wrong?|How do I make {dish} for {diet}?|What is a good side dish for {food}?|Suggest {n}
quick breakfasts.|Is {food} healthy?|What spices suit {food}?|How do I cook {food} properly?|Make a shopping list
for {dish} for {days} people.|What is the best way to store {food}?|Name a dish from {country} and tell me how it
is made.|Give me {n} ideas for snacks with {food}.|What dessert could I make for {event}?""",
    "how-to": """How do I {chore}?|What is the easiest way to {chore}?|Give me step-by-step instructions: how to
{chore}.|What do I need to {chore}?|I have never had to {chore}. Can you walk me through it?|How often should one
{chore}?|Write a short guide for beginners: how to {chore}.|Can I {chore} without special tools?|How do I use
{tool} to plan {event}?|How do I take care of {animal}?|How do I get started with {tool}?|How do I prepare for
{event}?|What should I look out for when I buy {product}?|How can I learn {subject} on my own?|How do I write a
good CV as a {job}?|Explain to a child how to {chore}.|How long does it take to {chore}?|What is the safest way to
{chore}?""",
    "science": """Why is it that {science}?|Can you explain why {science}?|My daughter asked me why {science}. What
do I say?|In one sentence: why is it that {science}?|How do scientists know why {science}?|What is the difference
between {things}?|Describe a simple experiment that shows why {science}.|What would happen if the Earth had no
moon?|How does {machine} work?|What is {machine} made of?|Who invented {invention}, and why did it matter?|How did
{invention} change the world?|What would life be like without {invention}?|Is it true that {science}?|Tell me
something surprising about {animal}.|What are open questions in {subject}?""",
    "definitions": """What is {term}?|What does "{word}" mean?|Define {term} in one sentence.|Use "{word}" in three
sentences.|What is a synonym of "{word}"?|Explain {term} as if I were five.|What is meant by {term}? Give an
everyday example.|What is the difference between {things}?|What is the opposite of "{word}"?|Where does the word
"{word}" come from?|I keep hearing about {term}. What is it, briefly?|Is {term} a good thing?|When do we use the
word "{word}"?|What is the difference between {term} and {term2}?|Give me {n} words that are related to {term}.""",
    "short facts": """What is {fact}?|Tell me {fact}.|Do you know {fact}?|Quick question: {fact}?|Just the answer,
please: what is {fact}?|{fact}|Who was {famous}?|What is {famous} known for?|When did {famous} live?|Which
continent is {country} on?|Name {n} cities in {country}.|What is {country} famous for?|Name {n} animals that live
in {country}.|How many minutes are there in {days} hours?|Name {n} colours.|Name {n} kinds of {kind}.|Which is
bigger, {country} or {country2}?|Is {word} a noun or an adjective?|Name {n} jobs that start with the letter
{letter}.|Spell "{word}" backwards.|What rhymes with {rhyme}?|How many letters has the word "{word}"?""",
    "opinions": """Do you think that {opinion}?|{opinion}. Do you agree?|Give arguments for and against:
{opinion}.|What do people mean when they say that {opinion}?|Convince me that {opinion}.|Write a balanced paragraph
on this claim: {opinion}.|What is more important, {value} or {value2}?|Which is better for beginners, {hobby} or
{hobby2}?|What do you like about {place}?|If you could visit {place} or {place2}, which would you choose?|Argue
against this: {opinion}.|What would a {job} say about this: {opinion}?|Is it wrong to {wrong}?|What makes a good
{job}?|Is {value} always good?""",
    "business": """How do I start {business}?|Suggest {n} names for {business}.|Write a slogan for {business}.|
Write an advertisement for {product}.|Who are the typical customers of {business}?|How can {business} win more
customers in {season}?|What does one need to open {business}? Make a list.|Write a short business plan for
{business}.|How should I price {product}?|Write a social media post about {product}.|What are the risks of
{business}?|A customer is unhappy with {product}. Write a reply.|Write a job description for a {job} at
{business}.|Write {n} interview questions for a {job}.|What is a fair salary for a {job}, and what does it depend
on?|How do I market {business} with {budget}?|Write a welcome text for the website of {business}.|Write a short
pitch for {product}.|How can I motivate a team during {event}?|Write the agenda of a meeting about {event}.|
Describe {product} in two sentences for a catalogue.|What could {business} offer besides?""",
    "writing help": """Write an e-mail that {mail}.|Draft a short message that {mail}.|Write a letter that {mail}.
Keep it polite.|Give me a subject line for an e-mail that {mail}.|Write a text message to {person} about {event}.|
Write a thank-you note to {person}.|Write an invitation to {event} {when}.|Write a short speech for {event}.|Write
a toast for {event}.|Write a caption for a photo of {animal}.|Write a review of {product}: four stars of five.|
Write a short biography of {name}, a {job} who loves {hobby}.|Help me to write an essay about {term}: what would be
a good outline?|Write a diary entry of {hero}.|Write an opening line for a {genre} story.|Improve this sentence:
{sentence}|Make this sound friendlier: "{rude}"|Make this more professional: "{casual}"|Write a limerick about
{animal}.|Write four lines of a poem about {season}.|Write a haiku about {hobby}.|Write a rhyme about {food}.|Write
a cover letter for a {job}.|Write a letter to my future self about my plan to {goal}.""",
    "stories": """Write a {genre} story about {hero}.|Tell me a bedtime story about {hero}.|Write a story
{setting}. The main character is {hero}.|One day {hero} finds {find}. What happens next?|Continue the story: One
morning {hero} finds {find} {setting}.|Write a dialogue between {hero} and {hero2}.|Write the end of a story in
which {hero} finds {find}.|Invent a legend about {find}.|Describe {hero} in three sentences.|Write a scene
{setting} in {season}.|Write a {genre} story in under 100 words.|Give me {n} ideas for a {genre} story about
{hero}.|Write a joke about {animal}.|Write a short play with {hero} and {animal}.|Describe a morning {setting}.|
Tell me a riddle about {find}.""",
    "brainstorming": """Give me {n} ideas for {event}.|Brainstorm {n} activities for a rainy day with {person}.|
Suggest {n} names for {animal}.|What could I do {when} with {budget}?|List creative uses for {thing}.|Suggest {n}
topics for a talk about {subject}.|Give me {n} ideas for presents for {person}, who likes {hobby}.|What games can
one play at {event}?|Suggest a theme for {event}.|Suggest {n} books for somebody who likes {genre} stories and
{hobby}.|What are unusual hobbies for somebody who likes {hobby}?|Give me {n} ideas for a blog about {hobby}.|
Suggest {n} questions that I can ask at {event}.|Make a to-do list for {event}.|What do I need for {event}? Make a
list.|What should I bring to {event} in {season}?|Suggest a daily routine for a {job}.|Come up with {n} projects
for learning {tool}.|Invent a new {genre} game for children and explain its rules.|Give me {n} conversation topics
for {event}.""",
    "role": """You are {role}. Introduce yourself.|Act as {role}. I ask: how can I {goal}?|Pretend to be {role} and
describe {place}.|Be {role} and explain {term}.|Talk to me like {role}. What is your opinion about {hobby}?|Let us
play: you are {role}, I am a guest. You begin.|As {role}, give me {n} tips for {event}.|How would {role} explain
why {science}?|Answer as {role}: what is the best thing about {season}?|Write a letter from {role} to {famous}.|
Imagine an interview with {famous}. Write three questions and answers.|What would {famous} say about {invention}?|
You are a tutor for {subject}. Ask me a question.|You are a helpful assistant of {business}. A customer asks about
opening hours. Reply.|You are {role} and {trouble_you}. Tell me about it.""",
    "study": """Help me to understand {term}.|I have a test in {subject} {when}. How should I study?|Make {n} flash
cards on {term}.|Summarise what one should know about {famous}.|Write a quiz question about {invention} with four
choices.|Explain the importance of {invention} in three sentences.|What are the main topics in {subject}?|What
happened in the life of {famous}? Make a short timeline.|Why do we learn {subject} at school?|Give me a memory
trick for {fact}.|Compare {famous} with {famous2}.|Write a paragraph about {country} for a school project.|What is
a good question about {subject} for an exam?|How do I take good notes in {subject}?|Name {n} important people in
the history of {subject}.|What is the easiest part of {subject}, and what is the hardest?""",
    "languages": """How do I say "{phrase}" in {language}?|Translate to {language}: {phrase}|What does this mean in
English: "{foreign}"?|Teach me {n} useful words in {language}.|How do I introduce myself in {language}?|Is this
correct English? "{slip}"|What is wrong with this sentence: "{slip}"|Rewrite so that it is correct: {slip}|Give me
a short dialogue in {language} with an English translation.|How hard is it to learn {language}?|Count from one to
{n} in {language}.""",
    "texts": """{text} Shorten this to one sentence.|What is the main idea? {text}|{text} What could happen next?|
Read this and answer: who is it about? {text}|Give this story a headline: {text}|Turn this into bullet points:
{text}|Rewrite this as a news report: {text}|{text} Write a question about this and answer it.|Put this into
simpler English: {text}|Is the tone of this text positive or negative? {text}|Retell this from another point of
view: {text}|Pick out the names and numbers: {text}|Make this text longer and more vivid: {text}|What is missing in
this text? {text}""",
    "small talk": """Hello!|Hi, how are you?|Good morning! What can you do?|Who are you?|What is your name?|Tell me
a joke.|Tell me a fun fact.|Tell me a joke about a {job}.|Tell me a fun fact about {country}.|What should we talk
about?|Hi, I am {name}. I like {hobby}.|Do you like {food}?|What is your favourite season?|Can you help me with
{subject}?|I am bored.|Good night!|Surprise me.|Thank you for your help!|What did you do {when}?|Let us talk about
{hobby}.|Are you a human?|Ask me a question.|What do you know about {place}?|I just finished {hobby}. What now?|
Tell me something nice.|Do you have feelings?|Motivate me to {goal}!""",
    "follow-up": """What is {term}?
---
In short, {term} is something that many people have heard of but few can explain.
---
{more}|How can I {goal}?
---
Start small, do it every day and write down how it goes.
---
{more}|Suggest a dinner.
---
How about {dish}? It is quick and most people like it.
---
{dinner}|I want to travel in {season}.
---
That sounds great! Where would you like to go, and for how long?
---
To {place}, for {days} days. I like {hobby} and good food.|I feel {feeling}.
---
I am sorry to hear that. Do you want to tell me more?
---
{trouble}.|Give me a name for {business}.
---
What do you think of "{name}'s Corner"?
---
{rename}|Who was {famous}?
---
{famous} is one of the best known people in history.
---
{famousmore}|Write a slogan for {product}.
---
"Made for every day."
---
{rename}|What can I do with {person} {when}?
---
You could go for a walk, cook together or try {hobby}.
---
{activity}|My name is {name} and I work as a {job}.
---
Nice to meet you, {name}! How can I help you {when}?
---
{jobhelp}|What is the capital of France?
---
The capital of France is Paris.
---
{capital}|Name {n} kinds of {kind}.
---
Of course. Do you want only the names, or a short description of each too?
---
{kindmore}|Explain why {science}.
---
There is a simple reason and a more exact one. Which would you like to hear?
---
{reason}|Help me with {subject}, please.
---
Gladly! What are you working on?
---
{studymore}""",
}

# How often each kind is drawn.
KIND_SHARES = {
    "advice": 10, "feelings": 5, "travel": 7, "cooking": 7, "how-to": 8, "science": 7, "definitions": 6,
    "short facts": 7, "opinions": 5, "business": 8, "writing help": 9, "stories": 6, "brainstorming": 7, "role": 5,
    "study": 5, "languages": 4, "texts": 6, "small talk": 3, "follow-up": 7,
}  # fmt: skip

# What people put before and after a question.
OPENINGS = """Hi! |Hello, |Hey, |Please help me. |I have a question. |Quick question: |Can you help me? |I need your
help. |OK, next: |I am curious. |For a friend: """
ENDINGS = """ Keep it short.| Answer in one sentence.| Use bullet points.| In at most 50 words, please.| Explain your
answer.| Be honest.| Give examples.| Thanks!| Please.| Number the points.| Answer in two or three sentences.| Use simple
words.| Be creative.| Be specific.| Write about 100 words."""
OPENING_SHARE, ENDING_SHARE = 0.12, 0.2

_SLOT = re.compile(r"\{(\w+?)(\d?)\}")


def compose_everyday(draw: random.Random) -> tuple[str, tuple[str, ...]]:
    """(kind, turns) of one everyday question; more turns than one are a conversation, the user's turn the last."""
    kind = draw.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
    turns = [turn.strip() for turn in filled(draw.choice(_KINDS[kind]), draw).split("---")]
    turns = [turn[:1].upper() + turn[1:] for turn in turns]
    if len(turns) == 1 and kind not in ("small talk", "texts"):
        if draw.random() < OPENING_SHARE:
            turns[0] = draw.choice(_OPENINGS) + turns[0]
        if draw.random() < ENDING_SHARE:
            turns[0] += draw.choice(_ENDINGS)
    return kind, tuple(turns)


def filled(template: str, draw: random.Random) -> str:
    """A template with its slots filled: equal slots alike, those of entries too; ``{x}`` and ``{x2}`` differently."""
    chosen: dict[str, str] = {}

    def fill(match: re.Match[str]) -> str:
        slot, name = match.group(1) + match.group(2), match.group(1)
        if slot not in chosen:
            entry = draw.choice([entry for entry in _WORDS[name] if entry not in chosen.values()])
            chosen[slot] = _SLOT.sub(fill, entry)
        return chosen[slot]

    return _SLOT.sub(fill, template)


def _entries(text: str) -> tuple[str, ...]:
    """The entries between |; a line end within one is a space, but for the lines of --- between turns."""
    entries = []
    for entry in text.split("|"):
        turns = re.split(r"\n---\n", entry)
        entries.append("---".join(" ".join(turn.split()) for turn in turns))
    return tuple(entries)


_WORDS = {name: _entries(text) for name, text in WORDS_TEXT.items()}
_KINDS = {kind: _entries(text) for kind, text in KINDS_TEXT.items()}
_OPENINGS = tuple(" ".join(text.split()) + " " for text in OPENINGS.split("|"))
_ENDINGS = tuple(" " + " ".join(text.split()) for text in ENDINGS.split("|"))
