"""Sixteen word problems in the manner of GSM8K, without its marks for a calculator; made up."""

WORD_PROBLEMS = [
    (
        "Nadia bakes 3 trays of 12 rolls and sells all but 8. How many rolls does she sell?",
        "She bakes 3*12=36 rolls.\nShe sells 36-8=28 rolls.\n#### 28",
    ),
    (
        "A bus has 40 seats. 26 people sit down, and 9 more get on. How many seats are free?",
        "There are 26+9=35 people.\nSo 40-35=5 seats are free.\n#### 5",
    ),
    (
        "Tomas saves $15 a week. He wants a bicycle for $180 and has $45. How many weeks?",
        "He needs 180-45=$135 more.\nThat takes 135/15=9 weeks.\n#### 9",
    ),
    (
        "Half of the 48 seedlings are beans. A third of the beans die. How many beans are left?",
        "48/2=24 are beans.\n24/3=8 die.\n24-8=16 left.\n#### 16",
    ),
    (
        "Ivo walks 4 km to work and back, 5 days a week. How far does he walk in 3 weeks?",
        "A day is 4*2=8 km.\nA week is 8*5=40 km.\nThree weeks are 40*3=120 km.\n#### 120",
    ),
    (
        "A book has 210 pages. Lea reads 30 pages a day for 4 days. How many pages remain?",
        "She reads 30*4=120 pages.\nSo 210-120=90 remain.\n#### 90",
    ),
    (
        "Eggs cost $3 a dozen. How much do 60 eggs cost?",
        "60/12=5 dozen.\nThey cost 5*3=$15.\n#### 15",
    ),
    (
        "Omar is 4 years older than twice the age of his sister, who is 9. How old is Omar?",
        "Twice her age is 2*9=18.\nOmar is 18+4=22 years old.\n#### 22",
    ),
    (
        "A tank of 500 litres loses 20 litres an hour. How full is it after 6 hours, in litres?",
        "It loses 20*6=120 litres.\n500-120=380 are left.\n#### 380",
    ),
    (
        "Rosa has 5 bags of 14 marbles. She gives 3 friends 10 marbles each. How many are left?",
        "She has 5*14=70 marbles.\nShe gives 3*10=30 away.\nShe keeps 70-30=40.\n#### 40",
    ),
    (
        "A shirt of $40 is 25% off. What does it cost?",
        "The discount is 40*0.25=$10.\nIt costs 40-10=$30.\n#### 30",
    ),
    (
        "In a class of 32, three quarters have a pet. How many have none?",
        "32*3/4=24 have a pet.\n32-24=8 have none.\n#### 8",
    ),
    (
        "A train goes 90 km an hour for 2 hours, then 60 km an hour for 3. How far does it go?",
        "First 90*2=180 km.\nThen 60*3=180 km.\nTogether 180+180=360 km.\n#### 360",
    ),
    (
        "Pia picks 7 baskets of 20 apples. 15 apples are bad. How many are good?",
        "She picks 7*20=140 apples.\n140-15=125 are good.\n#### 125",
    ),
    (
        "Four friends share a bill of $92 and add a tip of $8. What does each pay?",
        "Together 92+8=$100.\nEach pays 100/4=$25.\n#### 25",
    ),
    (
        "A hen lays 6 eggs a week. How many weeks do 5 hens need for 120 eggs?",
        "5 hens lay 5*6=30 eggs a week.\nThey need 120/30=4 weeks.\n#### 4",
    ),
]
"""Pairs of a question and its answer, of 50 to 90 tokens together."""
