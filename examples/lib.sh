# sourced by measure.sh: what a real experiment would get from its radio
loss_at() {  # rate in Mbit/s -> percent of packets lost
    echo $(($1 * $1 / 100 + $1 % 7))
}
