$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
read -P 256 0 512
read -P x 0 512
write -P -1 0 512
write -P 0x1ff 0 512
write -P 0377 0 512
read -P 255 0 512
