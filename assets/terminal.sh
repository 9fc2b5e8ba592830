# Draws assets/terminal.svg: training on Shakespeare, then two lines of a chat. Minutes on a CPU; needs rich.
set -eu
{
    echo '$ python train.py --dataset=shakespeare --sample_tokens=120 --eval_interval=550'
    python train.py --dataset=shakespeare --sample_tokens=120 --eval_interval=550
    echo
    echo '$ python sample.py --out_dir=out/shakespeare --interactive --max_new_tokens=150'
    for line in 'What say you of love?' 'Is the king come home?'; do
        sleep 12
        echo "$line" >&4
        echo "$line"
    done | python sample.py --out_dir=out/shakespeare --interactive --max_new_tokens=150 --seed=3
} 4>&1 2>&1 | grep -v -e '^step .* left$' -e '^threads: ' | python assets/terminal.py assets/terminal.svg
